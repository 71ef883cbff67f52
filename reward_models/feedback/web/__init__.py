"""The pages where people rank, and the server behind them."""
