"""Calibration: what is found for one network, by running it. Everything here sees a ``Problem`` and knows no ComfyUI.

    batches of samples -> teacher's targets -> a family of runs by parameters -> search -> artifact

The loss is that of the finished sample: matching intermediate states can lower every error on the way and raise the last.
"""
