"""The commands: `python -m jaxrl_eff NAME` runs `main` of the file NAME.py. All else is private."""
