"""What training runs leave to look at: figures, alarms, curves and samples."""
