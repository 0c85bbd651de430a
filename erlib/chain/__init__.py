"""The run contract: phases that are planned, executed, recorded and shown.

In: a params file and the notebooks.
Out: a folder with a manifest for each phase, reports as offline HTML, the index, the results.
"""
