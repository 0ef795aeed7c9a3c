"""Where files lie and how they are read: local disks, the web, any fsspec store, with retries."""
