"""Options resolved to rules, thresholds and reports: plain data, without torch."""
