"""One HTML page about one or several runs, made from the files that they have written.

`fastpg.report.page.write_page` writes it. The page needs no network: its style and its pictures
are inside it. It is made without a model, so also of a run that goes on, or that was stopped.
"""
