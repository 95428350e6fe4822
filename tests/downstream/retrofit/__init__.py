"""Objects that never heard of vmmig, each made a component of a machine by a few lines."""
