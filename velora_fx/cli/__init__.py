"""The command line, `velora-plan`."""
