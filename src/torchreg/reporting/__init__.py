"""Records of a scaling campaign in; one HTML page, Markdown, JSON and tables out."""
