"""The groups of `kaisar` commands. Each module parses, asks the node or the files, and prints; nothing decides here."""
