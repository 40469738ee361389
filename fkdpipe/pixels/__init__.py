"""An encoded image, a recorded crop, and uint8 pixels: both phases replay crops through here."""
