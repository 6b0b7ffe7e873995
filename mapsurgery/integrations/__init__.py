"""Conversion to and from other libraries' formats. Nothing of the core imports anything here."""
