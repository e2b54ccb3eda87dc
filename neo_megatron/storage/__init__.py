"""Local directories and object storage behind one interface."""
