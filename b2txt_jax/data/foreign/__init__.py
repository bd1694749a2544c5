"""Recordings in other laboratories' formats, written in the layout that everything here reads."""
