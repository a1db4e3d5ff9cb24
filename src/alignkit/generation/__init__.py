"""Generators: engines that write text, and the resumable way to run them over many prompts."""
