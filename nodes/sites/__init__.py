"""How ComfyUI carries out what accelerators decide: one module for each level (``composition.SITES``)."""
