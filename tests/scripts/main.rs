//! The Python scripts of `scripts/`, on made-up records and made-up GPU hosts.

mod bench_report;
mod cells;
mod gpu_check;
