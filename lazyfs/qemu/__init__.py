"""What lazyfs knows of QEMU: moving running guests to plain files, and the overlays that need an image."""
