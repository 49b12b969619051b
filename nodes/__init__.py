"""Everything that says "comfy": no arithmetic here, only translation."""
