# Headers, libraries, and what find_package and pkg-config read of them. In a wheel all of it lies
# inside the Python package, and nothing says where that will be: every path is relative.
include(CMakePackageConfigHelpers)
set(cmake_dir ${lib_dir}/cmake/asyncdiff_core)
set(pc_dir ${lib_dir}/pkgconfig)
set(configured ${PROJECT_BINARY_DIR}/install)

install(DIRECTORY csrc/include/ ${PROJECT_BINARY_DIR}/include/ DESTINATION ${include_dir}
  FILES_MATCHING PATTERN "*.hpp" PATTERN "*.h")
install(TARGETS asyncdiff EXPORT asyncdiff_core
  ARCHIVE DESTINATION ${lib_dir} LIBRARY DESTINATION ${lib_dir})
install(EXPORT asyncdiff_core NAMESPACE asyncdiff:: DESTINATION ${cmake_dir}
  FILE asyncdiff_core-targets.cmake)
if(ASYNCDIFF_HAS_CUDA)
  # Targets of their own, so that who uses the host's alone needs no toolkit.
  install(TARGETS asyncdiff_cuda EXPORT asyncdiff_core_cuda
    ARCHIVE DESTINATION ${lib_dir} LIBRARY DESTINATION ${lib_dir})
  install(EXPORT asyncdiff_core_cuda NAMESPACE asyncdiff:: DESTINATION ${cmake_dir}
    FILE asyncdiff_core-cuda-targets.cmake)
endif()

# A static CUDA runtime lacks what came after it, and the next major version has not all of this.
if(ASYNCDIFF_HAS_CUDA)
  set(asyncdiff_cuda_from ${CUDAToolkit_VERSION_MAJOR}.${CUDAToolkit_VERSION_MINOR})
  math(EXPR asyncdiff_cuda_until "${CUDAToolkit_VERSION_MAJOR} + 1")
endif()
configure_package_config_file(csrc/cmake/asyncdiff_core-config.cmake.in
  ${configured}/asyncdiff_core-config.cmake INSTALL_DESTINATION ${cmake_dir})
write_basic_package_version_file(${configured}/asyncdiff_core-config-version.cmake
  VERSION ${PROJECT_VERSION} COMPATIBILITY SameMinorVersion)
install(FILES ${configured}/asyncdiff_core-config.cmake
  ${configured}/asyncdiff_core-config-version.cmake DESTINATION ${cmake_dir})

file(RELATIVE_PATH pc_include /${pc_dir} /${include_dir})
# A shared library has linked these itself.
set(pc_host_libs "")
if(NOT BUILD_SHARED_LIBS)
  set(pc_host_libs " -lpthread -ldl -lrt")
endif()
set(pc_files asyncdiff)
if(ASYNCDIFF_HAS_CUDA)
  list(APPEND pc_files asyncdiff_cuda)
endif()
foreach(name IN LISTS pc_files)
  configure_file(csrc/cmake/${name}.pc.in ${configured}/${name}.pc @ONLY)
  install(FILES ${configured}/${name}.pc DESTINATION ${pc_dir})
endforeach()
