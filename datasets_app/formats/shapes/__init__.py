"""One file per shape of record; each defines `FORMAT`. Found by name: nothing to register."""
