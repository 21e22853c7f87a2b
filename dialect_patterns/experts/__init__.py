"""Mixtures of experts: MoE, QMoE and GatedAdd of com.microsoft."""
