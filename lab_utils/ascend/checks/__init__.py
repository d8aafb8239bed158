"""The checks of ``lab ascend check``; what one is, ``lab_utils.ascend.check`` says."""
