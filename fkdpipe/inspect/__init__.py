"""Inspect stores: label analysis, contact sheets, storage reports, HTML pages.

    sources    labels of a store as probabilities, block by block
    measures   metrics of single labels: entropy, distances
    analysis   distributions, agreement, reliability, distances
    results    results of an analysis
    models     predictions of models on the recorded crops
    choose     selection of crops to show
    views      selected crops as pixels and bars
    sheet      contact sheets as pictures
    plots      figures of analyses and reports
    pages      contact sheets and analyses as self-contained HTML pages

Stores are only read.
"""
