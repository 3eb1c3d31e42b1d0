//! Mistakes planted in small kernels. A child process runs each; it must report the mistake and abort, or compute wrong
//! numbers. The correct twin computes the right numbers on every device.

use super::*;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_NONE;

const WRONG_NUMBERS: &str = "wrong numbers";
const NOT_FENCED: &str = "written since its last fence.proxy.async";
const STILL_READ: &str = "overwritten that a bulk copy has still to read";
const RACE: &str = "a race: ";
/// Devices on which a mistake shows: all, those with late asynchronous operations, those with early ones.
const ALL: &[i32] = &[0, 1, 2, 3];
const LATE: &[i32] = &[0, 2];
const EARLY: &[i32] = &[1, 3];
/// Devices on which low blocks come first.
const UP: &[i32] = &[0, 3];

/// Kernel without its suffix, devices that show the mistake, and their message.
const PLANTED: [(&str, &[i32], &str); 17] = [
    ("missing_barrier", ALL, WRONG_NUMBERS),
    ("missing_second_barrier", ALL, WRONG_NUMBERS),
    ("copy_not_awaited", LATE, WRONG_NUMBERS),
    ("copy_too_early", EARLY, WRONG_NUMBERS),
    ("copy_left_over", LATE, "ends with a cp.async that it has not waited for"),
    ("divergent_shuffle", ALL, "meet in different collectives"),
    ("wrong_mask", ALL, "not in the mask"),
    ("absent_lane", ALL, "reads from a lane that takes no part"),
    ("two_barriers", ALL, "deadlock"),
    ("past_shared", ALL, "past the end of dynamic shared memory"),
    ("past_array", ALL, "past an array's end"),
    ("misaligned_vector", ALL, "misaligned access"),
    ("misaligned_copy", ALL, "cp.async: an address that is not a multiple of 16"),
    ("misaligned_matrix", ALL, "ldmatrix: the address of a row is not a multiple of 16"),
    ("lost_lane", ALL, "of which lanes have ended"),
    ("past_buffer", ALL, "illegal address"),
    ("blocks_not_awaited", UP, WRONG_NUMBERS),
];
const PLANTED_HOPPER: [(&str, &[i32], &str); 17] = [
    ("box_not_awaited", &[0], "more arrivals at an mbarrier"),
    ("box_too_early", &[1], "deadlock"),
    ("no_mbarrier", &[0, 1], "an mbarrier that has not been initialised"),
    ("no_fence", &[0, 1], "before mbarrier_fence_init"),
    ("wrong_bytes", &[0, 1], "deadlock"),
    ("too_many_arrivals", &[0, 1], "deadlock"),
    ("product_not_fenced", &[0, 1], "without wgmma_fence"),
    ("product_not_awaited", &[0, 1], WRONG_NUMBERS),
    ("operand_overwritten", &[0], WRONG_NUMBERS),
    ("operand_registers_written", &[0, 1], "registers of an operand were written"),
    ("store_not_fenced", &[0, 1], NOT_FENCED),
    ("store_too_early", &[0, 1], WRONG_NUMBERS),
    ("store_overwritten", &[0, 1], STILL_READ),
    ("store_left_over", &[0, 1], "bulk copies out of its shared memory have not been waited for"),
    ("product_unlike", &[0, 1], "do different things"),
    ("product_of_some", &[0, 1], "not all warps of a warpgroup"),
    ("registers_short", &[0, 1], "deadlock"),
];

/// Mistakes that are detected in the compiled kernel: races, whichever access came first, and writes that bulk copies
/// and products may not see.
const COMPILED: [(&str, &[i32], &str); 13] = [
    ("missing_barrier", ALL, RACE),
    ("missing_second_barrier", ALL, RACE),
    ("copy_too_early", ALL, RACE),
    ("box_too_early", &[0], RACE),
    ("operand_overwritten", &HOPPERS, RACE),
    ("operand_not_fenced", &HOPPERS, NOT_FENCED),
    ("store_not_fenced", &HOPPERS, NOT_FENCED),
    ("store_too_early", &HOPPERS, RACE),
    ("store_overwritten", &HOPPERS, STILL_READ),
    ("product_orders_lanes", &HOPPERS, RACE),
    ("blocks_not_awaited", &HOPPERS, RACE),
    ("blocks_not_fenced", &HOPPERS, RACE),
    ("blocks_overlap", &HOPPERS, RACE),
];

/// Whether the kernel computes the right numbers.
fn runs_right(gpu: &Gpu, kernel: &str) -> bool {
    let n = 512u32;
    let x: Vec<f32> = (0..n).map(|i| i as f32 + 0.5).collect();
    let (from, to) = (gpu.put(&x), gpu.put(&vec![0f32; n as usize + 1]));
    let right = |to: u64, exact: &dyn Fn(usize) -> f32| {
        gpu.get::<f32>(to, n as usize).iter().enumerate().all(|(i, got)| *got == exact(i))
    };
    let reversed = |i: usize| x[i / 256 * 256 + 255 - i % 256];
    if kernel.starts_with("offset") {
        // Row 2²⁰ + 1 of rows of 4096 elements.
        let before = ((1 << 20) + 1) * 4096 * size_of::<f32>();
        // SAFETY: sparse memory, of which only what is touched is mapped.
        let to = unsafe { result::malloc_sync(before + n as usize * size_of::<f32>()) }.unwrap();
        gpu.run(gpu.function("planted", kernel), [1; 3], [256, 1, 1], 0, &mut [arg(&from), arg(&to), arg(&n)]);
        return right(to + before as u64, &reversed);
    }
    let product = ["product", "operand", "registers"].iter().any(|of| kernel.starts_with(of));
    let hopper = product || PLANTED_HOPPER.iter().any(|(name, ..)| kernel.starts_with(name));
    let grid = [if kernel.starts_with("blocks") { 2 } else { 1 }, 1, 1];
    let block = [if kernel.starts_with("registers") { 384 } else { 256 }, 1, 1];
    if kernel.starts_with("store") {
        let map = tensor_map::<f32>(to, &[256, 2, 1], 1024, &[256, 1, 1], CU_TENSOR_MAP_SWIZZLE_NONE).unwrap();
        let function = gpu.function("planted_sm90", kernel);
        gpu.run(function, grid, block, 2048, &mut [arg(&map), arg(&from), arg(&n)]);
    } else if hopper {
        let map = tensor_map::<f32>(from, &[256, 2], 1024, &[256, 1], CU_TENSOR_MAP_SWIZZLE_NONE).unwrap();
        let function = gpu.function("planted_sm90", kernel);
        gpu.run(function, grid, block, 2048, &mut [arg(&map), arg(&to), arg(&n)]);
    } else {
        let function = gpu.function("planted", kernel);
        gpu.run(function, grid, block, 2048, &mut [arg(&from), arg(&to), arg(&n)]);
    }
    if product { right(to, &|_| 64.0) } else { right(to, &reversed) }
}

/// The body of the child process: runs what `SWAT_PLANTED` = `device kernel` names; does nothing otherwise.
#[test]
fn child() {
    let Ok(planted) = std::env::var("SWAT_PLANTED") else { return };
    let (ordinal, kernel) = planted.split_once(' ').unwrap();
    let gpu = Gpu::open(ordinal.parse().unwrap()).expect("a stand-in");
    if kernel.starts_with("offset") {
        swat_standin::sparse(ordinal.parse().unwrap(), 2);
    }
    assert!(runs_right(&gpu, kernel), "{WRONG_NUMBERS}");
}

/// A child process that runs this kernel.
fn in_child(kernel: &str, ordinal: i32) -> Command {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "planted::child", "--nocapture"]).env("SWAT_PLANTED", format!("{ordinal} {kernel}"));
    child
}

#[test]
fn mistakes_of_compiled_kernels_are_detected() {
    if Gpu::open(0).is_none() {
        return;
    }
    for (kernel, devices, message) in COMPILED {
        for ordinal in devices {
            let run = |kernel: &str| {
                let output = in_child(kernel, *ordinal).env("SWAT_TEST_CUDA", "ptx").output().unwrap();
                (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
            };
            let (passes, said) = run(&format!("{kernel}_wrong"));
            assert!(!passes && said.contains(message), "{kernel} on device {ordinal}: {said}");
            let (passes, said) = run(&right_twin(kernel));
            assert!(passes, "{kernel} on device {ordinal}: {said}");
        }
    }
}

/// Kernels with a product of ones and zeros share one.
fn right_twin(kernel: &str) -> String {
    let shared = ["product_not", "product_unlike", "product_of", "operand"].iter().any(|of| kernel.starts_with(of));
    if shared { "product_right".into() } else { format!("{kernel}_right") }
}

#[track_caller]
fn assert_detected(kernel: &str, ordinal: i32, message: &str) {
    let child = in_child(&format!("{kernel}_wrong"), ordinal).output().unwrap();
    let said = String::from_utf8_lossy(&child.stderr);
    assert!(said.contains(message), "{kernel} on device {ordinal}: {}, said: {said}", child.status);
    if message != WRONG_NUMBERS {
        assert_eq!(child.status.signal(), Some(6), "{kernel} on device {ordinal}");
        let place = format!("stand-in GPU: {kernel}_wrong: ");
        assert!(said.contains(&place) && said.contains("block (0, 0, 0), thread ("), "{said}");
    }
}

#[test]
fn right_twins_pass() {
    for ordinal in DEVICES {
        let Some(gpu) = Gpu::open(ordinal) else { return };
        for (name, ..) in PLANTED {
            assert!(runs_right(&gpu, &format!("{name}_right")), "{name} on device {ordinal}");
        }
        for name in ["blocks_not_fenced", "blocks_overlap"] {
            assert!(runs_right(&gpu, &right_twin(name)), "{name} on device {ordinal}");
        }
        for (name, ..) in PLANTED_HOPPER.iter().filter(|_| HOPPERS.contains(&ordinal)) {
            assert!(runs_right(&gpu, &right_twin(name)), "{name} on device {ordinal}");
        }
    }
}

#[test]
fn mistakes_are_detected() {
    if Gpu::open(0).is_none() {
        return;
    }
    for (kernel, devices, message) in PLANTED {
        devices.iter().for_each(|ordinal| assert_detected(kernel, *ordinal, message));
    }
}

/// Tensors of more than 2³² elements show offsets of 32 bits.
#[test]
fn an_offset_that_overflows_is_detected() {
    if Gpu::open(0).is_none() {
        return;
    }
    for ordinal in DEVICES {
        assert_detected("offset_overflows", ordinal, WRONG_NUMBERS);
        assert!(in_child("offset_overflows_right", ordinal).status().unwrap().success(), "device {ordinal}");
    }
}

#[test]
fn interleaved_blocks_show_what_serial_ones_hide() {
    if Gpu::open(0).is_none() {
        return;
    }
    for ordinal in DEVICES {
        for (kernel, blocks, passes) in [
            ("blocks_overlap_wrong", "1", true),
            ("blocks_overlap_wrong", "2", false),
            ("blocks_overlap_right", "2", true),
        ] {
            let output = in_child(kernel, ordinal).env("STANDIN_BLOCKS", blocks).output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.success(), passes, "{kernel}, {blocks} by turns, device {ordinal}: {said}");
            assert!(passes || said.contains(WRONG_NUMBERS), "{said}");
        }
    }
}

#[test]
fn mistakes_of_hopper_kernels_are_detected() {
    if Gpu::open(0).is_none() {
        return;
    }
    for (kernel, devices, message) in PLANTED_HOPPER {
        devices.iter().for_each(|ordinal| assert_detected(kernel, *ordinal, message));
    }
}
