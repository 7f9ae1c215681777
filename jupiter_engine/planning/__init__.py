"""What a training run takes and whether it can work, from numbers alone: memory, time, merging, what devices allow.

Pure arithmetic: no tensor library, no files, no machines. All sizes are bytes, all times seconds.
"""
