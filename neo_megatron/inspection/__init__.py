"""The parts of the page that `tools/inspect_data.py` writes."""
