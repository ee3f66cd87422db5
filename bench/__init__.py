"""What the speed figures are made with."""
