"""What `kaisar doctor` looks at: this machine and its files, and the network as the running node sees it."""
