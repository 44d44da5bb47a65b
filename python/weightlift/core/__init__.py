"""What every room may use: errors, settings, reports, dtypes, devices. It knows no other room."""
