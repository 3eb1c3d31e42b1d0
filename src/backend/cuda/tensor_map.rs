//! Matrices as bulk tensor copies (TMA) see them.

use super::device::Device;
use super::memory::Slice;
use crate::error::Result;
use cudarc::driver::sys::{
    self, CUtensorMapDataType as DataType, CUtensorMapFloatOOBfill as Fill, CUtensorMapInterleave as Interleave,
    CUtensorMapL2promotion as Promotion, CUtensorMapSwizzle as Swizzle,
};
use half::bf16;

/// Elements of a line of a box: 128 bytes, all of a swizzled line.
const BOX_COLUMNS: usize = 64;

/// Lines of `columns` elements, of which a copy takes a box of `box_lines` × [`BOX_COLUMNS`], swizzled within 128 bytes as
/// `wgmma_descriptor` of `kernels/prelude_sm90.cuh` has it. Outside the matrix a box is zeros.
///
/// # Errors
/// [`crate::Error::Device`] where the driver refuses it: a matrix of nothing, not on 16 bytes, or whose lines are not whole
/// 16 bytes.
pub(super) fn tensor_map(
    device: &Device,
    matrix: Slice<bf16>,
    columns: usize,
    box_lines: usize,
) -> Result<sys::CUtensorMap> {
    assert!(columns > 0 && matrix.len().is_multiple_of(columns), "{} elements in lines of {columns}", matrix.len());
    device.bind()?;
    let mut map = sys::CUtensorMap { opaque: [0; 16] };
    let dimensions = [columns as u64, (matrix.len() / columns) as u64];
    let (strides, extents, steps) =
        ([(columns * size_of::<bf16>()) as u64], [BOX_COLUMNS as u32, box_lines as u32], [1, 1]);
    // SAFETY: writes the map; every array has the entries of a matrix, and the matrix is what the slice holds.
    unsafe {
        sys::cuTensorMapEncodeTiled(
            &mut map,
            DataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            2,
            matrix.pointer() as *mut std::ffi::c_void,
            dimensions.as_ptr(),
            strides.as_ptr(),
            extents.as_ptr(),
            steps.as_ptr(),
            Interleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            Swizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            Promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            Fill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    }
    .result()
    .map_err(|error| device.failed("refused a tensor map", error))?;
    Ok(map)
}
