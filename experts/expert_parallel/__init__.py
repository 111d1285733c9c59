"""Expert parallelism in one machine: ranks that hold experts or send tokens to them, by windows (cuda/ep_window.h)."""
