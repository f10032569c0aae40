"""The version of HELM Engine, written here only: setup.py and the program both read it."""

__version__ = "0.1.0"
