"""Disturb a tiny study on purpose, again and again: no result may be lost, halved or taken for another."""
