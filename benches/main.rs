//! The executable of `cargo bench`. `swat_bench::common` says how to run it.

fn main() {
    swat_bench::common::main(swat_bench::FAMILIES);
}
