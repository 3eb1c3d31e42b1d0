//! Passes on where the kernels that swat embeds lie, for the stand-in GPU of the tests.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!(
        "cargo:rustc-env=SWAT_IMAGES={}",
        std::env::var("DEP_SWAT_KERNELS_IMAGES").expect("set by swat's build.rs")
    );
}
