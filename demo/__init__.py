"""The demo model: its picture world, networks, training and judge."""
