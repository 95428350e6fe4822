"""Real machines behind the traits; each module can be imported without the others."""
