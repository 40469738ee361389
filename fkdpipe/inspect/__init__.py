"""What is in a store, to look at: label analysis, contact sheets, pages.

    sources    labels of a store as probabilities, block by block
    measures   numbers of single labels: entropy, distances
    analysis   distributions, agreement, reliability, distances -> results
    results    the numbers of an analysis
    models     predictions of given models on the recorded crops
    choose     which crops to show
    views      the chosen crops as pixels and bars
    sheet      a contact sheet as one picture
    plots      figures of an analysis and of a report
    pages      the same as HTML pages that need no server

Nothing here writes to a store.
"""
