"""Figures, drawn from the files of a run, a plan, a sweep or a report; nothing here computes what it shows.

`figures`: those of a run, of a plan and of a sweep, as PNG and SVG files.
`scaling_figures`, `target_figures`: the pictures of a scaling report. `pictures`: what these share. `rendering`:
pictures as files and inside a page. `style`: colours and labels. `quantities`: numbers with units.
"""
