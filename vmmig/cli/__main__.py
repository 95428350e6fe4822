from vmmig.cli import main

main()
