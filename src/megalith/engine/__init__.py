"""One optimizer step on any layout, and the plainest loop around it. Free of Lightning."""
