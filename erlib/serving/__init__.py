"""The policy at work.

In: a merged checkpoint, files of documents.
Out: the folder to be served, reports at high throughput, timings.
"""
