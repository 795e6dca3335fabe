"""Knowledge condensation distillation: claims, runs, errata and figures."""
