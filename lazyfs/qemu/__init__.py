"""What lazyfs does with QEMU.

It moves running guests to plain files, and finds the overlays that need an image.
"""
