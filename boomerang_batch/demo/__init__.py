"""The demo's data: a small trained model, a slice of a real dataset, and the scripts that made both."""
