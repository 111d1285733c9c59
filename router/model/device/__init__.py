"""The trunk on a torch device. Its arithmetic is that of the CPU's kernels, rounded where they round."""
