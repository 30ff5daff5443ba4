"""DPO, SimPO and TGDPO with either guide on a real model and real pairs, over repeated splits."""
