"""Methods, one file each, in the package of their stage: see, locate, prove, change, follow."""
