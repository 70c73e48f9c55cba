"""What drives real vLLM: engines in this process, engines that take turns, servers."""
