"""Models of scaling, fitted to launches."""
