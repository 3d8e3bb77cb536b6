"""Reports: the page of a run, several runs compared, and the style that all plots share."""
