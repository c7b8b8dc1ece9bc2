"""What a fleet must survive: things are killed, stopped and filled while clients draw."""
