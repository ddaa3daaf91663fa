"""Hand-written kernels, one folder or file each; import them as `kernels.<name>`."""
